"""Exit statuses of the training commands, for the scripts and schedulers that decide by them."""

DONE = 0
FAILED = 1  # an error that nobody foresaw; its traceback is printed
MISTAKE = 2  # of the user: settings or data; starting again changes nothing
PREEMPTED = 75  # SIGTERM or SIGUSR1: a checkpoint was saved, start again to go on (sysexits.h: try again later)
LOST = 76  # another rank or its host is gone
DIVERGED = 77  # too many steps in a row whose loss or gradient was not finite
