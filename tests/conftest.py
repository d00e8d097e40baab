from experiments import SCRIPTS
from published import easydict  # noqa: F401
from web import server  # noqa: F401


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"experiment scripts found under configs/: {len(SCRIPTS)}")
