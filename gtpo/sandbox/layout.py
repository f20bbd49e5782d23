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
