"""Run a program in a process forked from one that has imported the library: real, without the import time."""
import gc
import importlib
import os
import sys

# The fork server imports this module last. Its processes need not search the imported libraries for garbage.
gc.freeze()


def run(program, words, folder, environment, out, err):
    """Run a program, `module:function`, in a folder with an environment, and write its streams to two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((0, os.devnull), (1, out), (2, err)): os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    module, function = program.split(":")
    sys.exit(getattr(importlib.import_module(module), function)(words))
