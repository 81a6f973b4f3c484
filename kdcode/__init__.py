__version__ = "0.1.0"


def load_draft(name, teacher=None):
    """The student that is shipped for a teacher of this name, or the one in a folder or on the hub; see `kdcode.speculative.load_draft`."""
    from kdcode.speculative import load_draft

    return load_draft(name, teacher)
