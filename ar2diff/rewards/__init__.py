"""Reward functions of `ar2diff rl`: finding them, the built-in ones, and the limits they run
under."""
