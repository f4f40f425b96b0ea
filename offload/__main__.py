"""`python -m offload`: the command line without the installed script."""

from offload.cli import main

main()
