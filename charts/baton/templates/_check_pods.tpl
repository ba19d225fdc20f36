{{/* What users add to pods, and Kubernetes would refuse or the chart has already. */}}

{{/* The parts of the values that pods are made of, by their path. JSON. (dict "root" $ "pools" …) */}}
{{- define "baton.podParts" -}}
{{- $values := .root.Values -}}
{{- $all := dict "gateway" $values.gateway "controller" $values.controller "ray.head" $values.ray.head -}}
{{- range $name, $pool := .pools -}}{{- $_ := set $all (printf "pools.%s" $name) $pool -}}{{- end -}}
{{- toJson $all -}}
{{- end -}}

{{- define "baton.checkAllProbes" -}}
{{- range $what, $part := include "baton.podParts" . | fromJson -}}
{{- range $kind := list "livenessProbe" "readinessProbe" "startupProbe" -}}
{{- with index $part $kind -}}
{{- include "baton.checkProbe" (dict "what" (printf "%s.%s" $what $kind) "kind" $kind "probe" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (dict "what" <values' path> "kind" livenessProbe "probe" …) */}}
{{- define "baton.checkProbe" -}}
{{- $probe := .probe -}}
{{- $asks := pick $probe "exec" "httpGet" "tcpSocket" "grpc" | keys | sortAlpha -}}
{{- if gt (len $asks) 1 -}}
{{- fail (printf "%s has %s: a probe asks one thing; leave one of them" .what (join " and " $asks)) -}}
{{- end -}}
{{- if and (hasKey $probe "exec") (not (default (dict) $probe.exec).command) -}}
{{- fail (printf "%s.exec has no command; set it" .what) -}}
{{- end -}}
{{- range $key, $least := dict "initialDelaySeconds" 0 "periodSeconds" 1 "timeoutSeconds" 1 "successThreshold" 1 "failureThreshold" 1 "terminationGracePeriodSeconds" 1 -}}
{{- if hasKey $probe $key -}}
{{- if lt (int (index $probe $key)) $least -}}
{{- fail (printf "%s.%s is %d; use %d or more" $.what $key (int (index $probe $key)) $least) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (ne .kind "readinessProbe") (hasKey $probe "successThreshold") (ne (int $probe.successThreshold) 1) -}}
{{- fail (printf "%s.successThreshold is %d: of a %s Kubernetes takes 1 alone; leave it out" .what (int $probe.successThreshold) .kind) -}}
{{- end -}}
{{- if and (eq .kind "readinessProbe") (hasKey $probe "terminationGracePeriodSeconds") -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: a readiness probe ends no container; leave it out" .what) -}}
{{- end -}}
{{- end -}}

{{/* Variables that the chart or KubeRay gives to whoever needs them. Another value would be a
     second truth, and one that nobody reads would only spread a secret. */}}
{{- define "baton.checkAllEnv" -}}
{{- $from := dict "BATON_SECRET" "secrets.cluster" "BATON_API_KEY" "secrets.apiKey" "BATON_CONTROLLER_TOKEN" "secrets.controllerToken" "BATON_CACHE" "paths.cache" "BATON_RUN_DIR" "paths.run" "BATON_ADVERTISE_HOST" "the pod's address" "REDIS_URL" "redis" "REDIS_PASSWORD" "redis or rayRedis" "RAY_ADDRESS" "ray.clientAddress" "RAY_AUTH_MODE" "ray.auth.enabled" "RAY_AUTH_TOKEN" "secrets.rayToken" "RAY_AUTH_TOKEN_PATH" "secrets.rayToken" "RAY_external_storage_namespace" "ray.gcsFaultTolerance.externalStorageNamespace" -}}
{{- $kuberays := list "FQ_RAY_IP" "KUBERAY_GEN_RAY_START_CMD" "RAY_CLOUD_INSTANCE_ID" "RAY_CLUSTER_NAME" "RAY_IP" "RAY_NODE_TYPE_NAME" "RAY_PORT" -}}
{{- range $what, $part := include "baton.podParts" . | fromJson -}}
{{- range $variable := $part.env -}}
{{- if hasKey $from $variable.name -}}
{{- fail (printf "%s.env has %s, which the chart sets where it is needed, from %s; leave it out" $what $variable.name (index $from $variable.name)) -}}
{{- end -}}
{{- if has $variable.name $kuberays -}}
{{- fail (printf "%s.env has %s, by which KubeRay tells a pod what it is; leave it out" $what $variable.name) -}}
{{- end -}}
{{- if and $variable.value $variable.valueFrom -}}
{{- fail (printf "%s.env has a value and a valueFrom for %s; choose one" $what $variable.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
