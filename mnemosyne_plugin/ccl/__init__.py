"""Flexible CCL: process groups whose members can be replaced while they live."""

from mnemosyne_plugin.ccl.mesh import Mesh as Mesh
from mnemosyne_plugin.ccl.mesh import PendingOperation as PendingOperation
from mnemosyne_plugin.ccl.mesh import create_group as create_group
from mnemosyne_plugin.ccl.registry import register as register
from mnemosyne_plugin.ccl.verbs import (
    get_reconfigure_handle as get_reconfigure_handle,
)
from mnemosyne_plugin.ccl.verbs import reconfigure as reconfigure
from mnemosyne_plugin.ccl.verbs import reseat as reseat
from mnemosyne_plugin.ccl.verbs import supports_reconfigure as supports_reconfigure
