"""The command in a process that is forked from one which has imported the library already: as real as any other, and there at once."""
import os
import sys


def command(words, folder, environment, out, err):
    """What such a process runs: the command, in a folder, with an environment, its streams written to two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((0, os.devnull), (1, out), (2, err)): os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    from kdcode.cli import main
    sys.exit(main(words))
