"""State equality on real programs: a checkpoint at a random moment of their work, a road back, equal before the first
instruction, and the work goes on to its right end."""

import os
import random
import time

import pytest

from equality import ROADS, Compared, hooks_installed
from harness import together
from programs import PROGRAMS

SEED = int(os.environ.get("CRAB_SEED", 2404))


@pytest.fixture(scope="module", autouse=True)
def hooks():
    with hooks_installed():
        yield


def goes_on(program, image, kind, road, directory):
    """None, or what went wrong."""
    begin = time.monotonic()
    try:
        with Compared(kind, directory, image=image) as box:
            for _ in program(box, random.Random(f"{SEED} {program.__name__} {kind}")):
                box.back(road, box.checkpoint(getattr(box, "peek", None)))
    except Exception as error:
        return f"{program.__name__}, {kind}, CRAB_SEED={SEED}: {type(error).__name__}: {error}"
    finally:
        print(f"  {program.__name__}, {kind}: {time.monotonic() - begin:.1f} s")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_go_on_from_exactly_where_they_were(kind, road, tmp_path):
    only = os.environ.get("CRAB_ONLY")
    chosen = [(program, image) for program, image in PROGRAMS[kind] if only in (None, program.__name__)]
    found = together([lambda p=p, i=i: goes_on(p, i, kind, road, tmp_path) for p, i in chosen], workers=4)
    failures = [failure for failure in found if failure]
    assert not failures, "\n".join(failures)
