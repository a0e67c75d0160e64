"""Makes mx.cpu MLX's default device in every Python process that has this folder on its PYTHONPATH.

conftest.py puts it there where AGENTMEM_TEST_DEVICE is `cpu`, for the servers that tests start.
"""

import mlx.core as mx

mx.set_default_device(mx.cpu)
