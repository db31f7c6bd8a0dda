"""Flexible CCL: process groups whose members can be replaced while they live."""

from mnemosyne_plugin.ccl.mesh import Mesh as Mesh
from mnemosyne_plugin.ccl.mesh import create_group as create_group
from mnemosyne_plugin.ccl.registry import register as register
