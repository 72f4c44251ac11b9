"""How a student learns from a trained teacher to draw in fewer calls."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from limner.config.base import Fraction, Section

Scale = Annotated[float, Field(ge=0, le=100)]


class DistillationConfig(Section):
    """Of a run that `limner train --task distill` made. The rounds follow each other, each with its own teacher: the
    first learns guidance, the others halve the steps."""

    teacher: str = Field(description="the run or checkpoint it came from; a copy is kept inside the run")
    guidance: tuple[Scale, Scale] | None = Field(
        default=None, description="least and greatest scale that the student is told; none: it is told nothing"
    )
    guidance_share: Fraction = Field(
        default=0.3, description="of the budget, for learning guidance alone; 0: the first halving learns it as well"
    )
    steps: PositiveInt | None = Field(
        default=4, description="of the finished student; none: guidance is learnt alone, for any solver and steps"
    )
    first_steps: PositiveInt = Field(default=8, description="of the student in the first round of steps")
    teacher_steps: PositiveInt = Field(default=32, description="that this first round learns from")
    images: PositiveInt | None = Field(default=None, description="budget of all rounds together")
    budget_s: float | None = Field(default=None, gt=0, description="the same in seconds")

    @property
    def halvings(self) -> tuple[int, ...]:
        """The student's steps, round by round: first_steps, halved until `steps` are reached."""
        if self.steps is None:
            return ()
        found = [max(self.first_steps, self.steps)]
        while found[-1] > self.steps:
            found.append(max(self.steps, found[-1] // 2))
        return tuple(found)

    @model_validator(mode="after")
    def _possible(self) -> DistillationConfig:
        if self.guidance is not None and self.guidance[0] > self.guidance[1]:
            raise ValueError("guidance should be the least scale and the greatest")
        if self.guidance is None and self.steps is None:
            raise ValueError("there is nothing to learn: give steps, or a range of guidance")
        before = self.teacher_steps
        for steps in self.halvings:
            if before % steps:
                raise ValueError(f"{before} steps cannot be made {steps}: they should be a multiple; set "
                                 "distillation.first_steps and distillation.teacher_steps")  # fmt: skip
            before = steps
        return self
