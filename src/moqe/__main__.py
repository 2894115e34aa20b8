"""`python -m moqe` is the command line."""

from moqe.cli import main

main()
