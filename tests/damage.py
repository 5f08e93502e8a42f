"What is done to files before they are read, and what is expected of their reader."
import json
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

@st.composite
def damage(draw) -> Callable[[bytes], bytes]:
    "A way to damage bytes: bits flipped, bytes replaced, most of them near the beginning, where headers are; now and then the end is missing."
    spots = draw(st.lists(st.tuples(st.integers(0, 1 << 30), st.sampled_from([64, 400, 4000, 1 << 30]), st.integers(0, 255), st.booleans()), min_size=1, max_size=6))
    cut = draw(st.one_of(st.none(), st.none(), st.none(), st.floats(0, 1)))
    def apply(data: bytes) -> bytes:
        out = bytearray(data)
        for at, reach, value, replace in spots: at %= min(len(out), reach); out[at] = value if replace else out[at] ^ (1 << value % 8)
        return bytes(out[:int(cut * len(out))] if cut is not None else out)
    return apply

ABSURD = st.sampled_from([None, True, -1, 0, 1, 3, 10**9, 10**30, 1e308, 2.5, '', 'x', '../x', '\x1b[31m', [], {}, [[[]]], {'a': 1}, [1, 2, 3], [10**9] * 3, 'T1w'])

@st.composite
def absurd(draw) -> Callable[[bytes], bytes]:
    "A way to damage JSON: one value somewhere is another, or missing."
    where, value, missing = draw(st.integers(0, 1 << 30)), draw(ABSURD), draw(st.integers(0, 3)) == 0
    def apply(data: bytes) -> bytes:
        whole, places = json.loads(data), []
        def walk(thing):
            for key in thing if isinstance(thing, dict) else range(len(thing)) if isinstance(thing, list) else (): places.append((thing, key)); walk(thing[key])
        walk(whole)
        thing, key = places[where % len(places)]
        if missing: del thing[key]
        else: thing[key] = value
        return json.dumps(whole).encode()
    return apply

def answers(use: Callable, *named: Path, seconds: float=20):
    "Use a file: it serves, or one line names it (or its folder) and says why not."
    began = time.process_time()
    try:
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); use()
    except RecursionError: raise
    except (ValueError, RuntimeError, OSError) as e:
        line = str(e)
        assert '\n' not in line and any(str(path) in line for path in named), f'{type(e).__name__}: {line[:500]}'
    assert time.process_time() - began < seconds

def many(n: int): return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

@pytest.fixture(autouse=True)
def little_memory():
    "A reader that believes an absurd size ends in MemoryError, which is no answer."
    space = next(int(line.split()[1]) * 1024 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmSize'))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (space + (3 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
