//! The seam to the RDMA device.
