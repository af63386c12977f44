"""What happens inside a training job."""

import warnings

# Megatron-core announces at import which optional kernels it lacks, and torch that Megatron uses
# old names; models/layer_specs.py decides what is used.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|torch)\..*")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
