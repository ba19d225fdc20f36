{{/* What the schema cannot say: settings that do not fit together. Fails with a sentence. */}}
{{- define "baton.check" -}}
{{- include "baton.checkNames" . -}}
{{- include "baton.checkModel" . -}}
{{- include "baton.checkPaths" .Values.paths -}}
{{- include "baton.checkObjectNames" . -}}
{{- include "baton.checkAllPeers" .Values.networkPolicy -}}
{{- include "baton.checkUsers" . -}}
{{- $config := include "baton.bareConfig" . | fromJson -}}
{{- $pools := include "baton.pools" . | fromJson -}}
{{- include "baton.checkAllLabels" (dict "root" . "pools" $pools) -}}
{{- include "baton.checkAllAnnotations" (dict "root" . "pools" $pools) -}}
{{- include "baton.checkAllResources" (dict "root" . "pools" $pools) -}}
{{- include "baton.checkConfig" (dict "root" . "config" $config) -}}
{{- include "baton.checkTimes" (dict "config" $config) -}}
{{- range $name, $pool := $pools -}}
{{- include "baton.checkPool" (dict "root" $ "name" $name "pool" $pool "config" $config) -}}
{{- end -}}
{{- include "baton.checkDecode" $pools -}}
{{- include "baton.checkEngines" (dict "pools" $pools "config" $config) -}}
{{- include "baton.checkGateway" . -}}
{{- include "baton.checkHead" (dict "root" . "config" $config) -}}
{{- include "baton.checkAllProbes" (dict "root" . "pools" $pools) -}}
{{- include "baton.checkAllEnv" (dict "root" . "pools" $pools) -}}
{{- include "baton.checkAccounts" . -}}
{{- include "baton.checkScraping" . -}}
{{- include "baton.checkRedis" . -}}
{{- include "baton.checkRayRedis" . -}}
{{- include "baton.checkOneRedis" . -}}
{{- end -}}

{{- define "baton.checkNames" -}}
{{- $name := include "baton.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "%q cannot name a RayCluster and its Services: lower-case letters, digits and hyphens, beginning with a letter, at most 40 characters; choose another release name or set fullnameOverride" $name) -}}
{{- end -}}
{{- end -}}

{{/* Labels of the user's beside the chart's own. (dict "root" $ "pools" …) */}}
{{- define "baton.checkAllLabels" -}}
{{- $values := .root.Values -}}
{{- $all := dict "commonLabels" $values.commonLabels "gateway.labels" $values.gateway.labels "controller.labels" $values.controller.labels "ray.head.labels" $values.ray.head.labels "monitoring.labels" $values.monitoring.labels -}}
{{- range $name, $pool := .pools -}}{{- $_ := set $all (printf "pools.%s.labels" $name) $pool.labels -}}{{- end -}}
{{- range $what, $labels := $all -}}
{{- range $key, $_ := $labels -}}
{{- if regexMatch "^(helm[.]sh/chart|app[.]kubernetes[.]io/(name|instance|component|part-of|version|managed-by)|(baton[.]dev|ray[.]io)/.*)$" $key -}}
{{- fail (printf "%s has %s, by which the chart or KubeRay tells its own pods from others; choose another name" $what $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Annotations of the user's beside the chart's own. (dict "root" $ "pools" …) */}}
{{- define "baton.checkAllAnnotations" -}}
{{- $values := .root.Values -}}
{{- $all := dict "gateway" $values.gateway.annotations "controller" $values.controller.annotations "ray.head" $values.ray.head.annotations -}}
{{- range $name, $pool := .pools -}}{{- $_ := set $all (printf "pools.%s" $name) $pool.annotations -}}{{- end -}}
{{- range $what, $annotations := $all -}}
{{- range $key, $_ := $annotations -}}
{{- if has $key (list "checksum/config" "checksum/secrets" "baton.dev/generation") -}}
{{- fail (printf "%s.annotations has %s, by which the chart replaces pods when they have to be; choose another name" $what $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Each a port, and no two on one. (dict "what" <values' path> "ports" {name: port}) */}}
{{- define "baton.checkPorts" -}}
{{- $taken := dict -}}
{{- range $name, $port := .ports -}}
{{- if or (not (regexMatch "^[1-9][0-9]{0,4}$" (toString $port))) (gt (int $port) 65535) -}}
{{- fail (printf "%s: %s is %v, which is no fixed port; choose one from 1 to 65535" $.what $name $port) -}}
{{- end -}}
{{- $port = toString $port -}}
{{- if hasKey $taken $port -}}
{{- fail (printf "%s: %s and %s are both on port %s of one pod; choose two" $.what (index $taken $port) $name $port) -}}
{{- end -}}
{{- $_ := set $taken $port $name -}}
{{- end -}}
{{- end -}}

{{- define "baton.checkDecode" -}}
{{- $decoding := 0 -}}
{{- range $name, $pool := . -}}
{{- if eq $pool.role "decode" -}}{{- $decoding = add $decoding (int $pool.replicas) -}}{{- end -}}
{{- end -}}
{{- if not (int $decoding) -}}
{{- fail "no pool of role decode has replicas: every answer is decoded there; give one of them 1 or more" -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "config" <baton.bareConfig>) */}}
{{- define "baton.checkHead" -}}
{{- $values := .root.Values -}}
{{- $params := include "baton.headStartParams" .root | fromJson -}}
{{- range $key, $instead := dict "labels" "ray.head.labels" "redis-password" "rayRedis.password" -}}
{{- if hasKey $params $key -}}
{{- fail (printf "ray.head.rayStartParams.%s is refused by KubeRay; set %s" $key $instead) -}}
{{- end -}}
{{- end -}}
{{- range $values.ray.head.env -}}
{{- if has .name (list "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_REDIS_ADDRESS") -}}
{{- fail (printf "ray.head.env has %s, which is refused by KubeRay; rayRedis says where Ray's Redis is" .name) -}}
{{- end -}}
{{- end -}}
{{- if and $values.ray.auth.enabled (semverCompare "<2.52.0" $values.ray.version) -}}
{{- fail (printf "ray.version is %s, but token authentication came with 2.52.0; take a newer Ray, or set ray.auth.enabled=false if nobody but these pods can reach the head" $values.ray.version) -}}
{{- end -}}
{{- $client := index $params "ray-client-server-port" -}}
{{- if ne (int $client) (int $values.ray.ports.client) -}}
{{- fail (printf "ray.head.rayStartParams has ray-client-server-port %s, but the controller and the network policies go by ray.ports.client (%d); set that" $client (int $values.ray.ports.client)) -}}
{{- end -}}
{{- $address := default "" .config.cluster.ray_address -}}
{{- if not $address -}}
{{- fail "config.cluster.ray_address is empty, so the controller would start a Ray of its own; leave it out" -}}
{{- end -}}
{{- $host := regexReplaceAll "^ray://|:[0-9]+/?$" $address "" | lower -}}
{{- $host = regexReplaceAll "[.]svc([.].*)?$" $host "" | trimSuffix (printf ".%s" .root.Release.Namespace) -}}
{{- if eq $host (include "baton.headService" .root) -}}
{{- if ne (regexFind "[0-9]+/?$" $address | trimSuffix "/") $client -}}
{{- fail (printf "the controller is told %s, but the head listens on port %s (ray.ports.client)" $address $client) -}}
{{- end -}}
{{- else if $values.networkPolicy.enabled -}}
{{- fail (printf "the controller is told %s, but the network policies let it reach this release's head alone, and its workers' pods are there; leave ray.clientAddress and config.cluster.ray_address out, or set networkPolicy.enabled=false if that is another way to the same head" $address) -}}
{{- end -}}
{{- if or (ne (index $params "num-cpus") "0") (contains "baton-pool-" (index $params "resources" | default "")) -}}
{{- fail "ray.head.rayStartParams offers what workers ask for (num-cpus over 0, or a pool's resource), and the head would run them; leave it out" -}}
{{- end -}}
{{- $ports := pick $params "port" "ray-client-server-port" "node-manager-port" "object-manager-port" "metrics-export-port" -}}
{{- if $values.ray.head.dashboard -}}{{- $_ := set $ports "the dashboard" "8265" -}}{{- end -}}
{{- include "baton.checkPorts" (dict "what" "ray.ports" "ports" $ports) -}}
{{- end -}}

{{- define "baton.checkAccounts" -}}
{{- $account := .Values.serviceAccount -}}
{{- if and .Values.ray.autoscaling.enabled (not $account.create) (not $account.names.head) -}}
{{- fail "serviceAccount.create is false and ray.autoscaling is enabled: KubeRay would give the autoscaler's rights over pods to the namespace's default account; set serviceAccount.names.head" -}}
{{- end -}}
{{- end -}}

{{/* Gateways and the controller are scraped on the port that clients use. */}}
{{- define "baton.checkScraping" -}}
{{- $policy := .Values.networkPolicy -}}
{{- if and $policy.enabled .Values.monitoring.serviceMonitor.enabled (not $policy.monitoring) -}}
{{- range $clients := list "clients" "controllerClients" -}}
{{- if index $policy $clients -}}
{{- fail (printf "networkPolicy.%s is set, but with monitoring.serviceMonitor any pod of any namespace may reach the same port to scrape it; set networkPolicy.monitoring to where your Prometheus is" $clients) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.gatewayGrace" -}}
{{- $drain := (index .Values.config "gateway").drain_s | default 10 | ceil | int -}}
{{- $least := add (int .Values.gateway.preStopSeconds) $drain 10 -}}
{{- $given := int .Values.gateway.terminationGracePeriodSeconds -}}
{{- if and $given (lt $given (int $least)) -}}
{{- fail (printf "gateway.terminationGracePeriodSeconds is %d, but preStopSeconds and config.gateway.drain_s take up to %ds: use %d or more, or 0 for that" $given (add (int .Values.gateway.preStopSeconds) $drain) (int $least)) -}}
{{- end -}}
{{- default $least $given -}}
{{- end -}}

{{- define "baton.checkGateway" -}}
{{- $scaling := .Values.gateway.autoscaling -}}
{{- if and $scaling.enabled (not (kindIs "invalid" .Values.gateway.replicas)) -}}
{{- fail "gateway.autoscaling is enabled and gateway.replicas is set: both would own the number; leave one of them out" -}}
{{- end -}}
{{- if lt (int $scaling.maxReplicas) (int $scaling.minReplicas) -}}
{{- fail "gateway.autoscaling.maxReplicas is below minReplicas; raise it" -}}
{{- end -}}
{{- $resources := default (dict) .Values.gateway.resources -}}
{{- $cpu := or (default (dict) $resources.requests).cpu (default (dict) $resources.limits).cpu -}}
{{- if and $scaling.enabled (not $scaling.metrics) (not $cpu) -}}
{{- fail "gateway.autoscaling goes by the share of gateway.resources.requests.cpu that is used, and there is none; set it, or other metrics" -}}
{{- end -}}
{{- $_ := include "baton.gatewayGrace" . -}}
{{- end -}}
