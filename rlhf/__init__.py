"""Classic RLHF as one command line: supervised fine-tuning, reward-model training, PPO."""

__version__ = "0.1.0"
