import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastkd")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--no-memory", action="store_true", help="leave out the peak memory (shorter)")
    group.addoption("--share", type=float, default=1.0, help="of the images of populations; the table says how many")
    group.addoption("--seconds", type=float, default=120, help="of the rounds of a population's case, about")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no GPU")
    return torch.device(name)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
