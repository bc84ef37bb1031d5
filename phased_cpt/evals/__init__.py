"""What is measured on a model, whichever phase trains it. A hook computes and returns numbers; it logs nothing."""

from collections.abc import Callable

from phased_cpt.evals.heldout import Measured, held_out_losses

__all__ = ["HOOKS", "Hook", "Measured", "held_out_losses"]

# Each is called with the engine, a function for the losses of rows, the sets and where this rank stands; it returns
# what it has measured, by name, and leaves the model and the random numbers as they were.
Hook = Callable[..., dict[str, Measured]]
HOOKS: dict[str, Hook] = {"held_out": held_out_losses}
