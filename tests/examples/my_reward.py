"""A rewarder of one's own: the fewer words, the better."""

from pydantic import Field

from dataflex_pipeline.reward import Reward
from dataflex_pipeline.reward.own import OwnRewarder, OwnSettings


class Brevity(OwnRewarder):
    class Settings(OwnSettings):
        words: int = Field(20, ge=1, description="words from which on an answer earns nothing")

    def reward(self, answers, keep):
        for position, answer in enumerate(answers):
            words = len(answer.completion.split())
            if words:
                keep(position, Reward(max(0.0, 1 - words / self.settings.words)))
            else:
                keep(position, Reward(None, reason="the answer is empty"))
