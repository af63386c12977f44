"""What people run beside training."""

import os

# Before anything here loads torch: threads that wait by spinning make small matrix products ten
# times slower on a machine that has other work to do (measured on two busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
