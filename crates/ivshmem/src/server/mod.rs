// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server: it hands out memory and doorbells.
