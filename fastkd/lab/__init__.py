"""One engine for studies: configurations, stages, training, records, tables and plans of experiments."""
