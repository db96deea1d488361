"""The one registry that MMPretrain does not have: attacks.

Everything else registers into MMPretrain's own registries (``MODELS``, ``HOOKS``, ...).
"""

from mmengine.registry import Registry

# The scope is MMPretrain's because its configs run under the default scope 'mmpretrain': under any other scope MMEngine
# would warn at every look-up that it fell back to this registry.
ATTACKS = Registry('attack', scope='mmpretrain', locations=['mmadvmoe.attacks'])
