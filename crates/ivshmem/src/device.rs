// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One type for all ways to the memory and the doorbells.
