"""Reward functions for `ar2diff rl`: loading them, the built-in ones, and the limits they run
under."""
