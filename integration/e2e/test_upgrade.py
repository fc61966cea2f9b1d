"""A new version takes the place of the program while sandboxes run: their shims, which are the old one, go on."""

import os
import pathlib
import shutil

from test_inspector import Watched

PROGRAM = pathlib.Path("/usr/local/bin/containerd-shim-crab-v2")


def test_a_shim_whose_program_was_replaced_goes_on_taking_checkpoints(tmp_path):
    with Watched(tmp_path) as sandbox:
        new = PROGRAM.with_suffix(".new")
        shutil.copy2(PROGRAM, new)
        os.replace(new, PROGRAM)
        line = sandbox.turn_of("sh", "-c", "sleep 1000 >/dev/null 2>&1 &")
        assert line["action"] == "full" and line["checkpoint"], line
