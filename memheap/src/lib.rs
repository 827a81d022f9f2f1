//! Free-list heap.
