"""How attention is preconditioned: the options that every model and the trainer share."""
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from engine.options import FIXED_IN_TRAINING, Options, at_least
from precond import LEARNED_FROM


@dataclass
class PrecondConfig(Options):
    precond: Annotated[bool, "precondition each head's output: row i times ||A_i||^-precond_power",
                       FIXED_IN_TRAINING] = False
    precond_grad: Annotated[bool, "let the gradient flow through the norms (the paper: no)",
                            FIXED_IN_TRAINING] = False
    precond_eps: Annotated[float, "added to the norms", FIXED_IN_TRAINING, at_least(0)] = 1e-8
    precond_power: Annotated[float | Literal["learned"],
                             "1: the paper's; 0: plain attention; 0.5: half-way; learned: one a "
                             "head, from 0.5", FIXED_IN_TRAINING] = 1.0

    @property
    def would_be(self) -> dict:
        """Keyword arguments of precond.precondition for the C of these options, on or off.

        A learned power stands at its first value.
        """
        power = LEARNED_FROM if self.precond_power == "learned" else self.precond_power
        return {"grad": self.precond_grad, "eps": self.precond_eps, "power": power}

    def describe_precond(self) -> str:
        """"precond=True" or "precond=False", then those of its options that are set."""
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)
                  if f.name.startswith("precond_") and getattr(self, f.name) != f.default]
        if self.precond or not chosen:
            return ", ".join([f"precond={self.precond}", *chosen])
        has = "has" if len(chosen) == 1 else "have"
        return f"precond=False ({', '.join(chosen)} {has} no effect on training)"
