"""The reference trainer behind the ``affkd`` command.

It needs the ``train`` extra (``pip install "affkd-kernels[train]"``) and is imported only by the
command itself: the losses never depend on it.

A way to read it, from a command down to a step:

| | |
|---|---|
| ``cli``, ``commands`` | exit codes; what each command takes and calls |
| ``config``, ``terms`` | a run as dataclasses: what a recipe holds |
| ``run``, ``rehearsal``, ``run_folder`` | around a run: the teacher first, mistakes told, files |
| ``loop``, ``step``, ``objective`` | the epochs, one step, what it minimizes |
| ``networks``, ``models``, ``data`` | student and teacher with their features; images in order |
| ``optimizer``, ``precision``, ``processes``, ``cost`` | how a step is executed and what it takes |
| ``evaluate``, ``assess`` | the scores of a run; those of ``affkd eval`` |
| ``runs``, ``published`` | ``affkd report`` over runs, beside the published figures |
| ``grid``, ``balance``, ``study`` | ``affkd grid``: plan and work; its weights; its report |
| ``demo``, ``methods``, ``report`` | ``affkd demo``: its rows, its table; progress lines |
"""
