"""``mnemosyne doctor``: what is here, what a job would use, what would not survive.

``examine`` looks, without a device and without importing a trainer. ``gaps`` and
``uses`` judge what it has found, and are pure. ``text`` and ``data`` tell it.
"""

from mnemosyne_plugin.doctor.examination import examine as examine
from mnemosyne_plugin.doctor.gaps import is_protected as is_protected
from mnemosyne_plugin.doctor.telling import data as data
from mnemosyne_plugin.doctor.telling import text as text
