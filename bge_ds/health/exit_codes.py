"""Exit statuses of the training commands, for scripts and schedulers."""

DONE = 0
FAILED = 1  # an unexpected error; its traceback is printed
MISTAKE = 2  # of the user, in settings or data; starting again does not help
PREEMPTED = 75  # SIGTERM or SIGUSR1: a checkpoint was saved, start again to continue (sysexits.h: EX_TEMPFAIL)
LOST = 76  # another rank or its host is gone
DIVERGED = 77  # too many steps in a row whose loss or gradient was not finite
