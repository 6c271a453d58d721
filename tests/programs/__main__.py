"""`python tests/programs NAME ARGS`: run the program NAME."""

import os
import sys

if __name__ == "__main__":
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Python puts this folder first, whose names would hide other modules.
    sys.path[:1] = [os.path.dirname(tests), tests]
    import programs

    programs.run(*sys.argv[1:])
