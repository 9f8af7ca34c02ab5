"""Fused implementations: loss and gradient of a triple in one call, behind one interface.

``loss_and_grad(spec, inputs, needs)`` and ``row_losses(spec, inputs)`` over the canonical inputs;
:mod:`affkd_kernels.dispatch` picks the module.
"""
