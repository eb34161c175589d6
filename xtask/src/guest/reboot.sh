# SPDX-License-Identifier: Apache-2.0 OR MIT
# The last part of a guest that comes back.
mark rebooting
reboot -f
sleep 100
