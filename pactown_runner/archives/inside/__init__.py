"""What runs as the tenant: programs of the standard library alone, for Python 3.9 or newer.

They do not run from here. The tenant cannot be expected to reach this package, nor the interpreter that it is
installed for, so their sources are handed to whatever Python the tenant can execute, see `archives.children`. Nothing
in here imports anything of this project but its neighbours.

Whatever they do they do with the tenant's uid, and the tenant's other processes may trace them, stop them and put
words into their mouths. So they protect nobody from the tenant; it is the kernel that does.
"""
