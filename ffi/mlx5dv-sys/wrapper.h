/* What `regenerate.sh` feeds to bindgen. */
#include <infiniband/verbs.h>
#include <infiniband/mlx5dv.h>
