/* A libibverbs that lists no device, for a machine that has none or has one: with LIST_ERRNO it fails to
 * list any, as without the kernel's support; without, its list is empty. Nothing else is ever called,
 * but who loads it looks for all of it. */

#include <errno.h>
#include <stdlib.h>

void **ibv_get_device_list(int *count)
{
#ifdef LIST_ERRNO
	(void)count;
	errno = LIST_ERRNO;
	return NULL;
#else
	if (count)
		*count = 0;
	return calloc(1, sizeof(void *));
#endif
}

void ibv_free_device_list(void **list)
{
	free(list);
}

#define NEVER(name) \
	void name(void) \
	{ \
		abort(); \
	}

NEVER(ibv_get_device_name)
NEVER(ibv_open_device)
NEVER(ibv_close_device)
NEVER(ibv_query_device)
NEVER(ibv_query_port)
NEVER(ibv_query_gid)
NEVER(ibv_alloc_pd)
NEVER(ibv_dealloc_pd)
NEVER(ibv_reg_mr)
NEVER(ibv_dereg_mr)
NEVER(ibv_create_comp_channel)
NEVER(ibv_destroy_comp_channel)
NEVER(ibv_create_cq)
NEVER(ibv_resize_cq)
NEVER(ibv_destroy_cq)
NEVER(ibv_get_cq_event)
NEVER(ibv_ack_cq_events)
NEVER(ibv_create_srq)
NEVER(ibv_modify_srq)
NEVER(ibv_query_srq)
NEVER(ibv_destroy_srq)
NEVER(ibv_create_qp)
NEVER(ibv_modify_qp)
NEVER(ibv_query_qp)
NEVER(ibv_destroy_qp)
NEVER(ibv_create_ah)
NEVER(ibv_destroy_ah)
NEVER(ibv_attach_mcast)
NEVER(ibv_detach_mcast)
NEVER(ibv_get_async_event)
NEVER(ibv_ack_async_event)
