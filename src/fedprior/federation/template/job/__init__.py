"""One federation: task.py is yours to change, the other two files are the same for every job."""
