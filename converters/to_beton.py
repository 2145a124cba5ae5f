"""Images and label maps → one .beton file: `tl-fast convert`, from a clone of the repository.

    python converters/to_beton.py IMAGES OUT.beton [--label-maps MAPS] [options]

tl_fast/convert/command_line.py is the command.
"""

import sys

from tl_fast.convert.command_line import main

if __name__ == "__main__":
    sys.exit(main())
