"""Draws configurations of every driver and compares each with jax in float64; prints each failure at its smallest.

    python tests/fuzz.py --seed 1 --count 500
    python tests/fuzz.py --only '{"kind": "window", ...}'   # one, as a failure prints it

Exits with 1 if anything fails. test_fuzz.py runs a small part of it, always the same one.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
import flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.forced(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fuzzing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", type=json.loads, help="a configuration; others are not drawn")
    options = parser.parse_args()
    if options.only:
        found = fuzzing.failure(options.only)
        print(found or "as jax has it")
        return found is not None
    failures = 0
    for i, config in enumerate(fuzzing.configurations(options.seed, options.count)):
        if fuzzing.failure(config):
            failures += 1
            print(f"{i}: {fuzzing.report(config)}", flush=True)
    print(f"{options.count} configurations of seed {options.seed}: {failures} failed.")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
