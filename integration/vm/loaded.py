"""Of pytest (`-p loaded`): a sandbox that does nothing lives for as long as the tests. While there is one the inspector's
programs stay loaded; an emulated machine would take half a minute for each test to load them again."""

import pytest

from test_armed_restore import Sandbox


@pytest.fixture(scope="session", autouse=True)
def programs_stay_loaded(tmp_path_factory):
    with Sandbox("ctr", tmp_path_factory.mktemp("loaded")) as sandbox:
        # The first turn waits for them.
        sandbox.exec("true")
        sandbox.settled()
        yield
