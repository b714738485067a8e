"""`python -m headgram`."""

from headgram.cli import main

main()
