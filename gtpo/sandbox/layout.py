"""Where things are in a jail, the same whoever builds it."""

NOBODY = 65534
"""The only user of a user namespace."""
BOX = "/box"
"""A session's working directory."""
LIBRARIES = "/opt/libraries"
"""What cells can import besides the standard library."""
LINKS_TO_BOX = ("/tmp", "/dev/shm")
# Not /dev/zero: mapped and shared it is memory that counts as nobody's.
DEVICES = ("/dev/null", "/dev/urandom")
STDIN = "/dev/stdin"
"""In a jail with namespaces a file of each session, which holds the standard input of its cell."""
MAX_FILES = 64
"""How many files a cell may have open, those of the sandbox among them."""
# The last numbers, so that a cell's own files have the same as in any Python.
CONTROL_FD, OUTPUT_FD, NULL_FD, CLONES_FD = range(MAX_FILES - 4, MAX_FILES)
"""What an interpreter keeps open: its end of the control channel, spares of its output and of /dev/null, a pipe."""
