"""What every long run needs: files that are whole or absent, one process per folder, several processes that compute
together, stopping on request, and measurements.

It knows no study, no network and no graph; searches and studies are built on it.
"""
