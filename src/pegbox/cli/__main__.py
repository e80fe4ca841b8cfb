"""`python -m pegbox.cli`."""

from pegbox.cli.main import main

main()
