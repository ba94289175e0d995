"""How attention is preconditioned: the options that every model and the trainer share."""
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from engine.options import FIXED_IN_TRAINING, Options, at_least
from precond import LEARNED_FROM, LEARNED_SCALE_FROM


def positive(name, value, config):
    if not isinstance(value, str) and not value > 0:
        return f"{name}={value} must be above 0"


@dataclass
class PrecondConfig(Options):
    precond: Annotated[bool, "precondition each head's output: row i times "
                       "precond_scale ||A_i||^-precond_power", FIXED_IN_TRAINING] = False
    precond_grad: Annotated[bool, "let the gradient flow through the norms (the paper: no)",
                            FIXED_IN_TRAINING] = False
    precond_eps: Annotated[float, "added to the norms", FIXED_IN_TRAINING, at_least(0)] = 1e-8
    precond_power: Annotated[float | Literal["learned"],
                             "1: the paper's; 0: plain attention; 0.5: half-way; learned: one a "
                             "head, from 0.5", FIXED_IN_TRAINING] = 1.0
    precond_scale: Annotated[float | Literal["sqrt_d", "learned"],
                             "1: the paper's; sqrt_d: the root of the head's width, RMSNorm's; "
                             "learned: one a head, from 1", FIXED_IN_TRAINING, positive] = 1.0

    @property
    def would_be(self) -> dict:
        """Keyword arguments of precond.precondition for the C of these options, on or off.

        A learned power and a learned scale stand at their first values.
        """
        power = LEARNED_FROM if self.precond_power == "learned" else self.precond_power
        scale = LEARNED_SCALE_FROM if self.precond_scale == "learned" else self.precond_scale
        return {"grad": self.precond_grad, "eps": self.precond_eps, "power": power, "scale": scale}

    def describe_precond(self) -> str:
        """"precond=True" or "precond=False", then those of its options that are set."""
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)
                  if f.name.startswith("precond_") and getattr(self, f.name) != f.default]
        if self.precond or not chosen:
            return ", ".join([f"precond={self.precond}", *chosen])
        has = "has" if len(chosen) == 1 else "have"
        return f"precond=False ({', '.join(chosen)} {has} no effect on training)"
