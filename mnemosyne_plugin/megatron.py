"""What users of megatron.core call; see ``mnemosyne_plugin.adapters.megatron``."""

from mnemosyne_plugin.adapters.megatron import Session as Session
from mnemosyne_plugin.adapters.megatron import attach as attach
