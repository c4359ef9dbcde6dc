"""`python -m lvmppl` is the command `lvmppl`."""

from lvmppl.cli import main

if __name__ == "__main__":
    main()
