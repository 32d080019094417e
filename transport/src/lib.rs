//! Verbs transport: device, memory region, queue pair and completion over soft-RoCE.
