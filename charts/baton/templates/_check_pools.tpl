{{/* A pool whose pods would not come up, or would come up and not serve. */}}
{{- define "baton.checkPool" -}}
{{- include "baton.checkPlace" . -}}
{{- include "baton.checkWorkerPorts" . -}}
{{- $name := .name -}}
{{- $pool := .pool -}}
{{- if eq $name "gateway" -}}
{{- fail "pools.gateway: its workers would be named like gateways; choose another name" -}}
{{- end -}}
{{- if eq $name "headgroup" -}}
{{- fail "pools.headgroup: Ray calls its head's group so, and its autoscaler would take one for the other; choose another name" -}}
{{- end -}}
{{- $transport := (default (dict) .root.Values.config.kv_transfer).transport | default "auto" -}}
{{- include "baton.checkDegrees" . -}}
{{- if lt (int $pool.maxReplicas) (int $pool.replicas) -}}
{{- fail (printf "pools.%s.replicas (%d) is over maxReplicas (%d); raise the maximum" $name (int $pool.replicas) (int $pool.maxReplicas)) -}}
{{- end -}}
{{- if lt (int $pool.replicas) (int $pool.minReplicas) -}}
{{- fail (printf "pools.%s.replicas (%d) is below minReplicas (%d); raise one or lower the other" $name (int $pool.replicas) (int $pool.minReplicas)) -}}
{{- end -}}
{{- if hasKey $pool.worker "drain_s" -}}
{{- fail (printf "pools.%s.worker.drain_s is set by drainSeconds, which the pod's grace period follows; use that" $name) -}}
{{- end -}}
{{- if $pool.rdma.enabled -}}
{{- if not (and $pool.rdma.resourceName (gt (int $pool.rdma.count) 0)) -}}
{{- fail (printf "pools.%s asks for RDMA; name the device's resource in rdma.resourceName, with a count of 1 or more: without it pods would run on nodes that have none" $name) -}}
{{- end -}}
{{- if ne $transport "nixl" -}}
{{- fail (printf "pools.%s asks for RDMA, but config.kv_transfer.transport is %q, which cannot use it; Baton does not fall back to TCP behind your back: set nixl, or rdma.enabled=false" $name $transport) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $transport "nixl") (not $pool.rdma.enabled) -}}
{{- fail (printf "config.kv_transfer.transport is nixl, but pools.%s has no RDMA, and UCX would take TCP there without a word; set rdma.enabled=true with its resource for every pool" $name) -}}
{{- end -}}
{{- if and (has $transport (list "shared_memory" "cuda_ipc")) (eq $pool.role "prefill") -}}
{{- fail (printf "config.kv_transfer.transport is %s, but workers of pools.%s are in other pods than those of decode pools, as soon as it has any; use auto, nixl or gloo, or remove that pool" $transport $name) -}}
{{- end -}}
{{- $scaling := .root.Values.ray.autoscaling -}}
{{- if and $scaling.enabled (eq $scaling.version "v1") (int $pool.idleTimeoutSeconds) -}}
{{- fail (printf "pools.%s.idleTimeoutSeconds is for version v2 of the autoscaler, and ray.autoscaling.version is v1; leave it out or take v2" $name) -}}
{{- end -}}
{{- if hasKey $pool.rayStartParams "labels" -}}
{{- fail (printf "pools.%s.rayStartParams.labels is refused by KubeRay; leave it out" $name) -}}
{{- end -}}
{{- include "baton.checkContext" . -}}
{{- include "baton.checkMemory" . -}}
{{- $_ := include "baton.workerGrace" . -}}
{{- end -}}

{{/* Degrees that a pod's GPUs cannot be shared out over, or the embedded model cannot be split
     by. What other models allow is known to the worker, which refuses the rest as it starts. */}}
{{- define "baton.checkDegrees" -}}
{{- $ranks := int .pool.numRanks -}}
{{- $gpu := .root.Values.gpuResourceName -}}
{{- $others := list -}}
{{- range $resource, $_ := default (dict) .pool.resources.limits -}}
{{- if and (hasSuffix "/gpu" $resource) (ne $resource $gpu) -}}{{- $others = append $others $resource -}}{{- end -}}
{{- end -}}
{{- if and (gt $ranks 1) (or $others (mod (int .pool.numGpus) $ranks)) -}}
{{- fail (printf "pools.%s has %d GPUs in resources.limits (%s), but tensorParallelSize x expertParallelSize is %d; give it that many, or none at all to compute on CPUs, or change the degrees" .name (int .pool.numGpus) $gpu $ranks) -}}
{{- end -}}
{{- $model := .root.Values.model -}}
{{- if and (eq $model.source "embedded") (eq $model.embedded.name "smollm2-135m-instruct") -}}
{{- if not (and (eq (int .pool.expertParallelSize) 1) (has $ranks (list 1 3 9))) -}}
{{- fail (printf "pools.%s: tensorParallelSize %d x expertParallelSize %d does not fit the embedded model, which has 9 query heads, 3 KV heads and no experts; valid: tensorParallelSize 1, 3, 9 with expertParallelSize 1" .name (int .pool.tensorParallelSize) (int .pool.expertParallelSize)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* More tokens than the embedded model was trained for, which workers refuse as they start. What
     other models allow is known to them alone. (… "config" <baton.bareConfig>) */}}
{{- define "baton.checkContext" -}}
{{- $model := .root.Values.model -}}
{{- $engine := mergeOverwrite (dict) (default (dict) .config.engine) .pool.engine -}}
{{- if and (eq $model.source "embedded") (eq $model.embedded.name "smollm2-135m-instruct") (gt (int $engine.max_model_len) 8192) -}}
{{- fail (printf "pools.%s: engine.max_model_len is %d, but the embedded model was trained for 8192 tokens; lower it" .name (int $engine.max_model_len)) -}}
{{- end -}}
{{- end -}}

{{/* A worker asks Ray for what the pool says, so its pods have to offer that. */}}
{{- define "baton.checkPlace" -}}
{{- $from := dict "num-cpus" "numCpus" "num-gpus" "resources.limits" "resources" "name" -}}
{{- range $key, $setting := $from -}}
{{- if hasKey $.pool.rayStartParams $key -}}
{{- fail (printf "pools.%s.rayStartParams.%s follows from the pool's %s, by which its workers find their pods; leave it out" $.name $key $setting) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Of one pod: what its worker and its Ray node listen on. (… "config" <baton.bareConfig>) */}}
{{- define "baton.checkWorkerPorts" -}}
{{- $worker := include "baton.poolWorker" . | fromJson -}}
{{- $ports := pick (include "baton.workerStartParams" . | fromJson) "node-manager-port" "object-manager-port" "metrics-export-port" -}}
{{- range $setting := list "port" "metrics_port" -}}
{{- $port := int (index $worker $setting) -}}
{{- if not $port -}}
{{- fail (printf "worker.%s of pools.%s has to be a fixed port: probes and network policies name it; set config.worker.%s" $setting $.name $setting) -}}
{{- end -}}
{{- $_ := set $ports (printf "worker.%s" $setting) $port -}}
{{- end -}}
{{- include "baton.checkPorts" (dict "what" (printf "pools.%s" .name) "ports" $ports) -}}
{{- include "baton.checkHost" (dict "what" (printf "worker.host of pools.%s" .name) "host" $worker.host) -}}
{{- end -}}

{{/* What gives a hand-off's bytes their meaning. (dict "pools" … "config" <baton.bareConfig>) */}}
{{- define "baton.checkEngines" -}}
{{- $common := default (dict) .config.engine -}}
{{- range $name, $pool := .pools -}}
{{- if hasKey $pool.engine "load_format" -}}
{{- fail (printf "pools.%s.engine.load_format: every pool serves the same weights; set config.engine.load_format" $name) -}}
{{- end -}}
{{- end -}}
{{- $prefills := 0 -}}
{{- range $name, $pool := .pools -}}
{{- if eq $pool.role "prefill" -}}
{{- $prefills = add $prefills (int $pool.replicas) -}}
{{- end -}}
{{- end -}}
{{- $devices := dict -}}
{{- $each := list -}}
{{- range $name, $pool := .pools -}}
{{- if and (int $pool.replicas) $prefills -}}
{{- $device := index $pool.engine "device" | default (index $common "device") | default "cpu" -}}
{{- $experimental := index $pool.engine "experimental" | default (index $common "experimental") | default list -}}
{{- if and (eq $device "cuda") (not (has "gpu_handoff" $experimental)) -}}
{{- fail (printf "engine.device is cuda in pools.%s, and there is a prefill pool: handing over a GPU's KV is written and was never run; start without prefill workers, set engine.device: cpu, or, to try it all the same, engine.experimental: [gpu_handoff]" $name) -}}
{{- end -}}
{{- if and (eq $device "cuda") (gt (int $pool.numRanks) 1) -}}
{{- fail (printf "pools.%s has several ranks, each with KV on a GPU of its own, and there is a prefill pool: such KV is handed to nobody yet; start without prefill workers, or give its workers one rank" $name) -}}
{{- end -}}
{{- $_ := set $devices $device $name -}}
{{- $each = append $each (printf "%s in %s" $device $name) -}}
{{- end -}}
{{- end -}}
{{- if and (hasKey $devices "cuda") (hasKey $devices "cpu") -}}
{{- fail (printf "engine.device differs between pools (%s): KV goes from GPUs to GPUs, and from hosts' memory to hosts' memory; set it for all of them" (join ", " $each)) -}}
{{- end -}}
{{- range $setting, $default := dict "dtype" "auto" "block_size" 16 -}}
{{- $values := dict -}}
{{- $each := list -}}
{{- range $name, $pool := $.pools -}}
{{- $value := index $pool.engine $setting | default (index $common $setting) | default $default | toString -}}
{{- $_ := set $values $value $name -}}
{{- $each = append $each (printf "%s in %s" $value $name) -}}
{{- end -}}
{{- if gt (len $values) 1 -}}
{{- fail (printf "engine.%s differs between pools (%s): none could hand a request over to another; set config.engine.%s for all of them, and none in pools.*.engine" $setting (join ", " $each) $setting) -}}
{{- end -}}
{{- end -}}
{{- end -}}
