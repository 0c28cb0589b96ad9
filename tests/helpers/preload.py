"""What the server of `helpers.commands` imports before it forks. No device is used here: a fork would lose JAX's threads."""

import logging
import warnings

import transformers

import helpers.commands
import jaxembed.evaluate
import jaxembed.hub.export
import jaxembed.runs.train

warnings.filterwarnings("ignore", r"os\.fork\(\) was called")  # by JAX, which has no threads yet
logging.getLogger().handlers.clear()  # a library adds one, and commands then would not configure their own
LOADED = (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast, helpers.commands, jaxembed)
