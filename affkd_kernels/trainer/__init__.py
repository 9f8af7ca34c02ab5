"""The reference trainer behind the ``affkd`` command.

It needs the ``train`` extra (``pip install "affkd-kernels[train]"``) and is imported only by the
command itself: the losses never depend on it.
"""
